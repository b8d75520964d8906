"""One form for every table on real screens: questions, models, a protocol, and reports of it."""
