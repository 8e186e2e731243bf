"""stub"""
def decoder(device, dtype): return "prmt"
