"""python -m services.gateway"""

from common.lifecycle import run
from services.gateway.loop import serve

run("gateway", serve)
