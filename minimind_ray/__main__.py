"""`python -m minimind_ray` is `minimind-ray`."""

from minimind_ray.cli.main import run

run()
