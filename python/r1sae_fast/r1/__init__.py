"""(in construction)"""
