"""The parts of `study_llm.py`."""
