"""`python -m glm_jax` is `glm-jax`."""

import sys

from glm_jax.cli import main

sys.exit(main())
