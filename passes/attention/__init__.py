"""The rewrite of attention: find it, bring it to four dimensions, choose a kernel, put it in."""
