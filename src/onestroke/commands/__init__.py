"""What the commands do, one file each: parse nothing, compute nothing twice, print what the user needs."""
