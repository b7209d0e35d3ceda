"""What the commands in tools/ share.

None of these modules is a command, but compare.py starts in_turns.py as a script.
"""
