"""Compile reports for devices that are not attached: topologies, HLO, memory, roofline."""
