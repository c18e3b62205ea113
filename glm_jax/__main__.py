"""The process of `glm-jax`; `python -m glm_jax` is the same."""

import os
import sys
from typing import NoReturn

from glm_jax import signals


def main() -> NoReturn:
    """Run the command line. A signal ends the process at once while nothing has begun, and when all is done."""
    signals.handle(lambda *_: signals.leave())
    from glm_jax import startup

    startup.prepare()
    from glm_jax.cli.main import main as run

    code = run()
    signals.handle(lambda *_: os._exit(code))  # Python's exit takes a while, and would show a traceback
    sys.exit(code)


if __name__ == "__main__":
    main()
