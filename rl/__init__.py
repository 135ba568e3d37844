"""Teach: a probe on a frozen copy rewards the shrunk model."""

from rl.monitor import Monitor
from rl.questions import Question, Questions, questions_from_file
from rl.teach import Teaching, teach

__all__ = ["Monitor", "Question", "Questions", "Teaching", "questions_from_file", "teach"]
