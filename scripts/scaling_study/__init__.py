"""The parts of `scripts/study_scaling.py`."""
