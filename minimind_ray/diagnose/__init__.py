"""Read the records of a run or a sweep, and say what they show, why it may be so, and which setting to try."""
