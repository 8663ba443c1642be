"""Reading of optimized programs, from the text of `compiled.as_text()`."""
