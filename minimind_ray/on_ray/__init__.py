"""All that touches Ray. Ray reads its settings as it is imported, so they are made here, before any module below is."""

from __future__ import annotations

import os
from pathlib import Path

# Found out by measuring Ray 2.60: the reasons stand beside each.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Nothing phones home.
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # The new Parquet reader costs seconds per epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # A run's end is seen at the next poll, 2 s by default; each costs.
    # Ray's workers are nice (15), so that whatever else a machine does would stop a step's threads, which wait for each
    # other: 10 to 30 % of the time on two cores. A run is as urgent here as it is without Ray.
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",  # Started ahead, they take turns with what a run waits for.
    "RAY_ENABLE_AUTO_CONNECT": "0",  # A thread that is still at work when a run is left must not start another Ray.
    # Train functions run in threads, to which glibc would give arenas of their own, of memory mapped anew for each
    # large tensor (see `keep_freed_memory`); the main arena is chosen before a process starts.
    "MALLOC_ARENA_MAX": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",  # A spot instance may have 30 s left, 5 s of which are much.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Workers without GPUs keep CUDA_VISIBLE_DEVICES as it is.
    "RAY_DATA_LOG_LEVEL": "ERROR",  # Its own log file has the rest; the terminal is for our progress.
    # A warning about more worker processes than cores: here that is meant, on a machine with few.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "maximum expected startup concurrency",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

# Ray turns token authentication on by itself where it starts a cluster, but not where it joins one.
_token_named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
if _token_named or (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
