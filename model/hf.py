"""`python -m model.hf`: checkpoint folders in and out; see `model.checkpoint.folder`."""

from errors import command_line
from model.checkpoint.folder import main

if __name__ == "__main__":
    command_line(main)
