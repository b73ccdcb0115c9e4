"""What the processes of tests/test_distributed.py do: ``python -m tests.ranks ACT FOLDER``, once per rank."""
