"""Every bound of the system, by name, with the sums that must hold between them.

Units are last in the name. A bound that a user may want to change is a setting (common/config.py).
"""

# Requests
QUEUE_MAX = 16  # admitted and waiting, beside those that run
RUNNING_MAX = 8  # requests that share decode steps, if the KV cache has room for so many
KEPT_MAX = 16  # sequences in the KV cache whose request is over
KV_ROOM_TOKENS = 64  # room in the KV cache is given out in so many tokens: whole pages of a head

# A step
PREFILL_ROWS_MAX = 512  # tokens of a prompt in one step, if nothing else is asked for
PREFILL_ROWS_MIN = 64  # as few where memory is short
PREFILL_JOIN_SHARE = 8  # in the first of so many parts of a block others may still join it
PREFILL_ROWS_SHARED_MAX = 128  # while others decode, who wait for as long as a block takes
PREDICT_ROWS_MAX = 16  # of a request with more tokens in a step the whole layer is taken
PREDICT_TOGETHER_MAX = 64  # and of so many of several requests their union is nearly the whole
PREDICT_REQUESTS_KEPT = 12  # of whose last tokens the predictor knows

# Reads
READS_IN_FLIGHT_MAX = 256  # queue depth that the reader gives the drive
READ_BYTES_MAX = 1 << 20  # one merged read
READ_BUNDLES_MAX = 256  # one merged read; IOV_MAX is 1024
PART_BUNDLES_MIN = 64  # parts smaller than this cost more in messages than they hide
PART_BYTES_MAX = 16 << 20  # of a streamed layer: one part is multiplied while the next lands
PARTS_IN_FLIGHT_MAX = 4  # of one fetch
PREFETCH_BUNDLES_MAX = 128  # of one group that is read ahead of need
PREFETCH_GROUPS_IN_FLIGHT_MAX = 2  # one is being read while the other is taken up
PREFETCH_GROUPS_WAITING_MAX = 4  # with slots of their own: emptied, and perhaps for nothing
FETCHES_MAX = 1024  # under way, or with a part not released
STEPS_KEPT = 64  # step numbers by which a new step is told from one that goes on
PROBE_S = 5.0  # longest wait for the bundle by which a backend is probed
ALIGN_BYTES = 4096  # direct reads: offset, length and memory are multiples of this

# Messages
MESSAGE_BYTES_MAX = 8 << 20  # on any link: counted and dropped above it
WIRE_BYTES_MAX = 64 << 20  # ZeroMQ itself hangs up above it
LINK_MESSAGES_MAX = 1024  # high-water mark of every socket
RECEIVE_BATCH_MAX = 64  # messages taken from one socket before the others get a turn

# Logs
SPANS_MAX = 16_384  # spans that wait to be written; the oldest give way
SPANS_BYTES_MAX = 32 << 20  # of a service's spans; then they become <name>.1 and a new file begins
LOG_BYTES_MAX = 32 << 20  # of a service's log; then it becomes <name>.1 and a new one begins

# Time
POLL_S = 0.2  # longest sleep of a loop: so soon it sees a signal
HEALTH_EVERY_S = 0.4
HEALTH_LOST_S = 2.5  # a service silent for this long is lost
SEND_S = 2.0  # a peer that does not take a message for this long has stalled
PART_S = 30.0  # compute's longest wait for the next part of a layer: a disk that slept takes 10
START_S = 120.0  # from launch to Ready: a large model's resident weights are read in it
STOP_S = 3.0  # from the signal to the end of a service; then it is killed
HANG_S = 60.0  # a loop that does not turn for so long; one matrix product takes less
SLEPT_S = 5 * POLL_S  # a gap between the gateway's own looks in which it was the one that slept
WAITING_EVERY_S = 1.0  # a request with nothing else to say says that it is alive
PREFILLING_EVERY_S = 0.25  # how far a prompt is, is told no more often
CLOSE_S = 2.0  # a cancelled request's client waits this long for compute's figures
CLIENT_HEARTBEAT_S = 1.0  # ZeroMQ's own, on the clients' connections
CLIENT_LOST_S = 3.0  # a client whose connection is silent for this long is gone
CLIENT_LINGER_S = 0.5  # at the end: the last words reach the clients' sockets

assert PREDICT_ROWS_MAX < PREDICT_TOGETHER_MAX <= PREFILL_ROWS_MIN
assert PREFILL_ROWS_MIN <= PREFILL_ROWS_SHARED_MAX <= PREFILL_ROWS_MAX
assert RUNNING_MAX <= PREDICT_TOGETHER_MAX, "a shared step is predicted, not streamed whole"
assert RUNNING_MAX < PREDICT_REQUESTS_KEPT
assert READ_BYTES_MAX % ALIGN_BYTES == 0
assert READ_BYTES_MAX <= PART_BYTES_MAX
assert PREFETCH_GROUPS_IN_FLIGHT_MAX * PREFETCH_BUNDLES_MAX <= READS_IN_FLIGHT_MAX, (
    "a demand finds prefetched reads in the drive at worst, never in a queue before the drive"
)
assert MESSAGE_BYTES_MAX <= WIRE_BYTES_MAX
assert 4 * HEALTH_EVERY_S < HEALTH_LOST_S, "one late heartbeat is no loss"
assert HEALTH_LOST_S + POLL_S < 5.0, "a lost service fails its requests within 5 s"
assert SLEPT_S < HEALTH_LOST_S
assert CLOSE_S + CLIENT_LINGER_S <= STOP_S
assert 2 * CLIENT_HEARTBEAT_S < CLIENT_LOST_S
assert FETCHES_MAX <= LINK_MESSAGES_MAX
assert HEALTH_LOST_S < PART_S, "a dead reader is named by its silence, not by compute's wait"
assert PARTS_IN_FLIGHT_MAX * PART_BYTES_MAX / PART_S < 3e6, "a drive this slow, B/s, still reads"
