"""A report in the terminal, as Markdown, as a page and as files. Renderers see only the model."""
