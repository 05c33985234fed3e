"""Graph plumbing that any rewrite needs: values, views and copies, aliases and writes, insertion, clean-up."""
