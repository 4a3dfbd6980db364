"""`python -m text.world`: the demo's generated corpus; see `world`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("world", run_name="__main__", alter_sys=True)
