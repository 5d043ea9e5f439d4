# Made by proto/generate.py. Do not edit.
