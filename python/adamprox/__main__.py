"""The ``adamprox`` command: each subcommand is a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from . import __version__
from .command_line import fail

if TYPE_CHECKING:
    from collections.abc import Sequence

# Name: what it does. The module of that name has add_arguments(parser) and run(args) -> exit code.
COMMANDS = {
    "info": "what is installed, which backends can run here, and why the others cannot",
    "demo": "train the paper's kind of network with every optimizer, and compare (about a minute)",
    "paper": "the paper's experiments: pictures, tables and CSV (--quick: some minutes)",
    "bench": "time the optimizers beside torch's and other peers' (under three minutes)",
}

MODULES = {"paper": ".bench.paper"}  # that are elsewhere


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; ``argv`` without the program's name (default: the command line's)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="adamprox",
        description="Fused proximal Adam optimizers for PyTorch.",
        epilog="adamprox COMMAND --help tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"adamprox {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{name}: {summary}.")
        if name in argv:
            module = import_module(MODULES.get(name, f".{name}"), __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # errors of writing are met here, and not at exit
    except KeyboardInterrupt:
        fail(args.command, "interrupted")
    except BrokenPipeError:  # The reader has gone away, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        fail(args.command, str(error))
    return code


if __name__ == "__main__":
    sys.exit(main())
