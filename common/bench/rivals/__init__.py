"""The rivals: programs that inflash is measured beside, one module each, run in a cage.

`python -m common.bench.rivals.NAME`, from the checkout, by any interpreter that has the rival's
packages. It prints one line of JSON: a `Result`, or {"absent": sentence} with `ABSENT`'s status.
"""
