"""`python -m atat_fast.models.convert` is now `python -m atat_fast.convert`; the next release drops this name."""

import runpy

if __name__ == "__main__":
    runpy.run_module("atat_fast.convert", run_name="__main__", alter_sys=True)
