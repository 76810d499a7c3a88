"""``python -m qkv`` is the command line."""

from qkv.cli import main

if __name__ == "__main__":
    main()
