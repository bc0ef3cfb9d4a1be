"""How results are shown: tables as text and HTML, and progress on terminals and in notebooks."""
