"""From facts to a report: sections, tables, plots, and the renderers of terminal, Markdown and page."""
