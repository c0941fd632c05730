"""What a network is and what it computes, in figures that can be compared.

Every kind of network gets the same small input, the same on every machine
(inputs.py), and is loaded and run on it by its kind (subjects.py). Of each
output there are a norm, a spread and its first numbers (summary.py), so that
two programs, or two machines, can be compared without exchanging arrays;
reference.py asks the packages that the weights were published for.
"""
