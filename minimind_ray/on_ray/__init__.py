"""All code that uses Ray.

Ray reads its settings when it is imported. This file sets them, because it runs before every module of the package.
"""

from __future__ import annotations

import os
from pathlib import Path

# Chosen by measurements with Ray 2.60; each line has its reason.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Send no usage statistics.
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # The new Parquet reader costs seconds per epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # A run's end is noticed at the next poll, by default every 2 s.
    # By default Ray's workers have niceness 15. Any other work of the machine then stops single threads of a step while
    # the other threads wait: 10 to 30 % of the time on two cores. A run should be as urgent as without Ray.
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",  # Workers started ahead would slow down the start of a run.
    "RAY_ENABLE_AUTO_CONNECT": "0",  # A thread that outlives a run must not start another Ray.
    # Train functions run in threads. glibc would give each thread its own arena, which maps memory anew for each large
    # tensor (see `keep_freed_memory`). The number of arenas must be set before a process starts.
    "MALLOC_ARENA_MAX": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",  # Notices may give only 30 s; polls every 5 s waste too much.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Workers without GPUs keep CUDA_VISIBLE_DEVICES as it is.
    "RAY_DATA_LOG_LEVEL": "ERROR",  # Other messages are in Ray Data's log file; the terminal shows only our progress.
    # Hide the warning about more worker processes than cores: on a machine with few cores this is intended.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "maximum expected startup concurrency",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

# Ray itself turns on token authentication when it starts a cluster, but not when it joins a cluster.
_token_named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
if _token_named or (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
