"""A small GPT in plain torch.nn: the classic PyTorch language model, and nothing else."""

import math

import torch
from torch import Tensor, nn


class PositionalEncoding(nn.Module):
    """Adds sine and cosine waves of geometrically growing wavelength, then drops out.

    Source: Vaswani et al., "Attention Is All You Need", section 3.5, https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, dim: int, context: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(context).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        waves = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1)
        self.register_buffer("waves", waves.flatten(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, dim] with seq at most `context`; returns the same shape."""
        return self.dropout(x + self.waves[: x.shape[1]])


class PlainGPT(nn.Module):
    """Embedding, positional encoding, pre-norm Transformer layers under a causal mask, and a linear head.

    vocab: number of tokens. dim: width, even, a multiple of heads. context: the longest sequence, in tokens.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 256,
        heads: int = 4,
        layers: int = 4,
        context: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.dim, self.context = dim, context
        self.embedding = nn.Embedding(vocab, dim)
        self.position = PositionalEncoding(dim, context, dropout)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.head = nn.Linear(dim, vocab)
        self.loss = nn.CrossEntropyLoss()
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab] of the token after each one; with `targets`, the mean cross-entropy.

        tokens, targets: int64 [batch, seq], seq at most `context`.
        """
        seq = tokens.shape[1]
        x = self.position(self.embedding(tokens) * math.sqrt(self.dim))
        x = self.encoder(x, mask=self.mask[:seq, :seq], is_causal=True)
        logits = self.head(x)
        if targets is None:
            return logits
        return self.loss(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.8, top_k: int = 40) -> Tensor:
        """Draws `count` more tokens, each from the `top_k` likeliest; tokens: int64 [batch, seq >= 1]."""
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[:, -1] / temperature
            likeliest, index = logits.topk(min(top_k, logits.shape[-1]))
            drawn = torch.multinomial(likeliest.softmax(-1), 1)
            tokens = torch.cat([tokens, index.gather(-1, drawn)], dim=1)
        return tokens
