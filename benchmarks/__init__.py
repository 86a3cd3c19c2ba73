"""What kqat costs beside what else there is, measured on this machine; each file runs by itself.

Seconds depend on the machine and on what else it does. What is meant to be read are ratios of
runs that took turns in one process: their median, and their quartiles as a sign of the noise.
"""
