# SPDX-License-Identifier: Apache-2.0
"""What may be changed about an example when it is called: `--name VALUE` for its numbers."""

from __future__ import annotations

import argparse
import sys


def options(about: str, **defaults: int | str | bool) -> argparse.Namespace:
    """The defaults, or what the command line says in their place.

    Args:
        about: the example's docstring, which --help shows.
        defaults: `name=value`; False is a switch.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    for name, value in defaults.items():
        if value is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value}")
    # a notebook's arguments are its kernel's
    return parser.parse_args([] if "ipykernel" in sys.modules else None)
