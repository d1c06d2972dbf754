"""Will it fit, how long does it take, what does it cost: said before anything is launched, without weights or GPU."""
