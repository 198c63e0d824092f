import torch


def decode_levels(codes, w_dec, b_dec, x, levels, mix):
    dense = codes.to_dense().to(x.dtype)
    ys = []
    for p in range(mix.shape[0]):
        ys.append((dense * (levels <= p)) @ w_dec.to(x.dtype) + b_dec - x)
    e = torch.stack(ys)
    return torch.einsum("gp,pnd->gnd", mix.to(x.dtype), e), e[-1].clone(), e.square().sum(-1)
