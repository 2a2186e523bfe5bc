"""One file for each command: ``make_parser`` describes its flags, ``main`` runs it in this process."""
