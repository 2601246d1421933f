"""Answers of one model or several, scored and compared."""
