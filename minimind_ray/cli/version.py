"""`minimind-ray --version`."""

from __future__ import annotations

import typer


def print_version(asked: bool) -> None:
    """Print the versions of this package, Python, torch and Ray, and the device that training uses here; then exit."""
    if not asked:
        return
    import os
    import platform
    from importlib import metadata

    from minimind_ray.config.shipped import version

    print(f"minimind-ray {version()}")
    print(f"Python {platform.python_version()}, torch {metadata.version('torch')}, Ray {metadata.version('ray')}")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"device: {', '.join(f'{names.count(name)} x {name}' for name in dict.fromkeys(names))}")
    else:
        print(f"device: CPU, {os.cpu_count()} cores")
    raise typer.Exit
