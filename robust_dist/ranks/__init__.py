"""How ranks talk: shared values, decisions and errors (`talk`), votes that no rank waits for, and claims on folders."""
