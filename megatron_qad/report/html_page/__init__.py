"""The run report as one HTML file without any reference to another file: ``document.html`` writes it."""
