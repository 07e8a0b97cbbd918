#!/bin/sh
# Fetch and convert the data ahead of time: ./prepare_data.sh [--dataset NAME] [--data_root DIR]
# Takes job.py's flags. FL_DATA_MIRROR names a mirror to ask first, FL_DATA_TIMEOUT how many seconds all may take.
cd "$(dirname "$0")" || exit 1
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=${PYTHON:-python3}; fi
exec "$python" job.py --prepare_only "$@"
