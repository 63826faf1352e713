"""The bench: inflash beside its rivals, each under the same memory cap, all in one run."""
