"""`make demo`, and the tiny models that it and the tests serve. Not part of the product."""
