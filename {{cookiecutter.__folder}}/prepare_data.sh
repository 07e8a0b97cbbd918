#!/bin/sh
# Download and convert the data ahead of time: ./prepare_data.sh [--dataset NAME] [--data_root DIR]
# Takes job.py's flags. FL_DATA_MIRROR sets a mirror to try first, FL_DATA_TIMEOUT the time limit in seconds.
cd "$(dirname "$0")" || exit 1
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=${PYTHON:-python3}; fi
exec "$python" job.py --prepare_only "$@"
