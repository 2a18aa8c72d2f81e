"""One subject a file: from facts to the tables and notes of a section."""
