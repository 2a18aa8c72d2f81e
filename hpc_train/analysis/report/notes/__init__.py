"""What facts mean, in sentences: one file a subject. The maths is in the rooms that the facts come from."""
