"""Starts the command, so that Ctrl-C ends it without a traceback while modules are imported."""

import sys


def run() -> None:
    """Runs the command `kqat`."""
    try:
        from kqat.cli import run as run_command
    except KeyboardInterrupt:
        print("Interrupted. No file was left half written.", file=sys.stderr)
        sys.exit(130)
    run_command()


if __name__ == "__main__":
    run()
