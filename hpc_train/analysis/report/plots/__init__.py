"""The figures of a report: what each shows, and how it gets onto the page and into files."""
