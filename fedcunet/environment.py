"""The switches of Flower and Ray, set on import: import this before either of them.

Both read their switches when they are imported or start a process, so this module stands first
wherever they are used. A value that the user has set already stays as it is.
"""

import os

SWITCHES = {
    # No usage data leaves the machine, and nothing waits for an answer from outside.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise Flower 1.39 installs every dependency, torch too, into a fresh environment per run.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # Ray 2.55 otherwise hides the GPUs of workers without one by itself and warns that it will
    # stop doing so; the Ray engine hides them openly.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray prints remarks (a worker died) to standard output, which `--json` promises to one value;
    # all of them match this. The Ray engine says itself what matters.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)
