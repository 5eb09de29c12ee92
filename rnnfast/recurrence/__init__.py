"""The recurrence: what every cell and backend shares."""
