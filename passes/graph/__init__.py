"""Graph helpers that every rewrite needs: values, views and copies, aliases and writes, insertion, clean-up."""
