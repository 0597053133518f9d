"""NeuralMemory: a memory whose weights are written by gradient descent while a sequence is read. Start here.

Titans, arXiv 2501.00663, equations 8 to 18. Letters: b batch, n tokens, h heads, d features, c chunk, u keys and values
per token, o momentum order, k waiting tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import memory_inputs as inputs
from .checks import Words, flags, wrong
from .diverged import warn_if_diverged
from .engines.run import Carry, Run, built_run, still_run, store
from .gating.reading import EntryPages, entry_pages, given_page
from .gating.stages import GateCarry
from .memory_chunks import ChunkCarry, MemoryChunks
from .memory_inputs import Earlier
from .memory_options import batch_chunks
from .memory_state import LazyTensors, NeuralMemState, mem_state_detach
from .ops.modes import no_autocast
from .ops.scan import AssocScan
from .presets import paper_memory_kwargs
from .projections import conv_tails, output, queries
from .surprise import of_rows
from .switches import tell
from .unused import unused_parameters, with_unused

__all__ = ["AssocScan", "NeuralMemState", "NeuralMemory", "mem_state_detach"]


class NeuralMemory(MemoryChunks):
    """Reads [b n d], writes what it reads into the weights of a small network M, and answers from them: [b n d].

    The rule of Titans (arXiv 2501.00663): surprise is the gradient of |M(k) - v|^2 (eq. 12) and echoes, S_t = eta
    S_{t-1} - theta gradient; the memory fades and learns, M_t = (1 - alpha) M_{t-1} + S_t (eq. 13, 14); a read is M(q)
    (eq. 15); the tokens of a chunk are written at once (eq. 16 to 18). `paper` builds it as published; the defaults are
    those of the package titans-pytorch. Every option is causal, and any way of cutting a sequence into calls gives the
    same outputs (with pages: see page_switch_every).

    Args: Size and network
        dim: features of the sequence.
        chunk_size: tokens per chunk, an int or (retrieve, store). Momentum and decay act once per store chunk.
        batch_size: tokens between moves of the anchor, at which surprises are taken, to the memory; None: the anchor
            stays at the initial weights. A multiple of the store chunk. chunk_size = 1 with a batch size is the paper's
            rule. The updates of these tokens add up: with steps near 1 the memory can diverge, by default within some
            hundred tokens. Long streams need qk_rmsnorm with default_step_transform_max_lr below 1 / batch_size, and
            init_decay_bias of about -6 with mem_model_norm_add_residual (docs/stability.md).
        heads: memories side by side, each with its own keys, values, queries and weights.
        dim_head: features per head (default dim, with any number of heads).
        model: the memory network, [.. n dim_head] -> [.. n dim_head], a module without buffers; default
            MemoryMLP(dim_head, **default_model_kwargs).
        default_model_kwargs: of that MemoryMLP: depth, and expansion_factor.
        mem_model_norm_add_residual: wrap the model as LayerNorm(model(x)) (gamma + 1) + x.
        per_head_learned_parameters: own initial weights for each head.
        num_kv_per_token: keys and values per token.

    Args: Rates
        default_step_transform_max_lr: the largest step theta: a sigmoid times this.
        adaptive_step_transform: in place of that, what turns the step's logits [b n h*u] into steps.
        per_parameter_lr_modulation: a learned factor of the surprise per chunk, head and parameter of the model.
        max_mem_layer_modulation: its largest value; it is a sigmoid times this.
        momentum: surprise echoes, eq. 10.
        momentum_order: how often: the echo is repeated on its own output.
        learned_momentum_combine: mix the orders per chunk by a learned softmax; else the last is used.
        learned_combine_include_zeroth: the raw surprise joins that mixture.
        attn_pool_chunks: for momentum and decay a chunk stands for the learned softmax pool of its tokens instead of
            their mean.
        init_adaptive_step_bias: the step's logit at the start, its weights at zero; None: as nn.Linear starts.
        init_momentum_bias: the same of momentum.
        init_decay_bias: the same of decay.

    Args: What is written
        store_memory_loss_fn: (prediction, target) [.. d] -> [..]; default the mean squared error over d.
        max_grad_norm: soft limit of each chunk's gradient per parameter.
        spectral_norm_surprises: orthogonalise each matrix update by Newton-Schulz, as Muon does.
        gated_transition: at each batch boundary the memory becomes anchor + sigmoid(g) (memory - anchor), g learned.
        accept_weight_residual: forward takes `prev_weights`, an earlier memory layer's `updates`, mixed into the
            anchor.
        store_with_lookahead_value: key t goes with value t + 1 within a chunk.
        surprise_threshold: a pair whose surprise is below it is not learned from (its step is 0), and a chunk of such
            pairs alone neither fades the memory nor moves its momentum; may be set at any time. Masks do not matter to
            it.
        surprise_source: "memory", the pair's loss at the anchor (eq. 12); or "prediction", the mean square error of a
            learned linear prediction of the normalised token, made one token before, which all pairs of the token
            share. The predictor learns from `auxiliary_loss` alone.

    Args: Queries, keys, values, output
        pre_rmsnorm: RMSNorm of the sequence before store and before retrieve.
        post_rmsnorm: RMSNorm of what each head reads.
        qk_rmsnorm: RMSNorm of queries and keys. It fixes the size of a key and does not keep a stream finite by itself:
            see batch_size.
        qk_l2norm: queries and keys of unit norm, after the activation (section 4.4). Better without
            mem_model_norm_add_residual, whose LayerNorm magnifies the gradients at what is so small.
        activation: after the key, value and query maps (and their convolutions).
        qkv_conv_kernel: a causal convolution over this many tokens, each channel on its own, after the query, key and
            value maps and before the activation (section 4.4); what it looks back on is carried in the state. It sees
            tokens that are masked.
        output_gate: "sigmoid" or "silu": RMSNorm of what each head reads, times this of a linear map of the query view
            [dim -> heads * dim_head], then the output projection, also with one head (section 4.4). It takes the place
            of the gate per head.
        qkv_receives_diff_views: seq is [3 b n d], the query, key and value views.

    Args: Gates of the decay
        use_symplectic_gating: a chunk's decay is multiplied by 1 - scale * complexity, the largest of its tokens'.
            scale is learned, from 0.5.
        symplectic_gate_kwargs: complexity is by SymplecticGating(dim, **symplectic_gate_kwargs).
        symplectic_gate: or by this module of one's own. It is given tokens [b n d], the normalised key view of the
            complete chunks being stored behind as many earlier tokens as its attribute `context` says (1), and gives [b
            n 1]; with keyed or hierarchical paging it is called with return_manifold_state = True and gives ([b n 1],
            dict(phase_angle = [b n pairs]) or None). It is called once in each call that completes a chunk, with a
            batch_size once for each batch window of it, unless its attribute `causal` is True: that more tokens change
            none of its scores.
        use_dmd_gating: the same with tanh of the DMD error of the last tokens.
        dmd_window: how many these are (16, or the chunk if longer).
        combine_symplectic_and_dmd: needed with both gates together: the mean of scores and of scales.
        kinetics_coupling: where steps are large beside the decay, decay shrinks and steps grow (gating/kinetics.py).
        kinetics_mix: how much, in [0, 1]; 0 changes nothing.
        kinetics_eps: keeps its ratio of step to step and decay finite.

    Args: Pages
        num_pages: copies of the heads, all read together, of which each row writes one: it starts on page 0 and turns
            to another where a chunk's complexity exceeds a threshold. On the other pages nothing moves. Needs a gate.
            `page_switch_events`, a tensor, counts the switches; 0 without pages.
        symplectic_page_threshold: that threshold (0.5, with DMD 0.4); may be set at any time, see
            `calibrate_page_threshold`.
        page_threshold_quantile: or, in its place, this quantile of the complexities of the last chunks.
        page_threshold_window: how many these are.
        page_switch_every: at most one switch in each window of as many tokens, a multiple of the store chunk, counted
            from position 0. None: at most one in a call, or a batch window of it, so that pages depend on how a
            sequence is cut into calls.
        manifold_state_keyed_paging: turn to the page in whose share of the circle the gate's phase angle lies; without
            a phase, and by default, to the next page.
        hierarchical_paging: turn to a coarse page by complexity, in it to a fine one by the phase.
        coarse_pages: how many; coarse_pages * fine_pages is num_pages. Default: 1, or what fine_pages leaves.
        fine_pages: how many in each. Default: what coarse_pages leaves.
        hierarchy_mix: share of that page in a mixture with the next page, in [0, 1].
        page_router: turn to a page of one's own choice, (page, complexity, angle) -> page, elementwise; angle is None
            unless it has `uses_phase = True`.
        read_active_page_only: a token reads the page that was active when the last chunk was written that it reads, and
            no other; by default all pages, joined as heads are. Tokens of a chunk that turns a page read the new one
            from its last token on. Pages that are not read get no gradient there.

    Args: Computation
        engine: "auto" chooses by counting operations; "dual", "matrix" and "reference" give the same numbers.
        use_accelerated_scan: the accelerated-scan kernel in the reference engine, where it runs.

    Raises:
        ValueError: for an argument of the wrong type, shape or range, by name.
    """

    @classmethod
    def paper(cls, dim: int, segment: int = 64, *, dim_head: int | None = None, **changes) -> "NeuralMemory":
        """The memory as the paper describes it.

        Args:
            dim: features of the sequence.
            segment: C, tokens between moves of the weights at which gradients are taken (eq. 16).
            dim_head: features per head (default dim).
            changes: any keywords of the constructor, or of `presets.paper_memory_kwargs`, in place of its own or beside
                them.
        """
        return cls(dim, **paper_memory_kwargs(dim if dim_head is None else dim_head, segment, **changes))

    # the three calls

    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = None,
        state: NeuralMemState | None = None,
        detach_mem_state: bool = False,
        prev_weights: Mapping[str, Tensor] | None = None,
        store_mask: Tensor | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
    ):
        """Stores the sequence chunk by chunk and reads the memory at every token.

        A token at absolute position t reads the memory after floor((t + 1) / c) complete chunks. Any way of cutting a
        sequence into calls, the state carried, gives the same outputs.

        Args:
            seq: [b n d], or one token [b d]; [3 b n d] with qkv_receives_diff_views.
            store_seq: what is stored instead of seq, of the same length; [2 b n d] with qkv_receives_diff_views.
            state: what the call before returned.
            detach_mem_state: cut the returned state from the graph.
            prev_weights: `updates` of an earlier memory layer (accept_weight_residual).
            store_mask: [b n] bool; False: the token is not learned from (its step is 0).
            return_surprises: also return (loss, step), each [b h n*u] over the complete chunks stored, and with
                surprise_source = "prediction" the predictor's error [b n]: `auxiliary_loss` makes a scalar of them.
            ttt_batch_size: batch_size for this call.

        Returns:
            (retrieved [b n d], next_state), and (loss, step) if asked for.

        Raises:
            ValueError: for another shape or dtype, or a state of another memory, batch size or position.
        """
        flags(detach_mem_state=detach_mem_state, return_surprises=return_surprises)
        views = inputs.as_views(seq, store_seq, self.dim, self.diff_views)
        state, expected = inputs.checked_state(self, state), self._expected(views.store)
        expected.check(state)
        inputs.check_mask(store_mask, *views.query.shape[:2], "store_mask")
        inputs.check_dtype(views.query, self.to_queries, "seq")
        inputs.check_dtype(views.store, self.to_keys, "store_seq")
        position = state.position
        run, next_state, surprises, pages = self._store(views.store, state, prev_weights, store_mask, ttt_batch_size)
        entry = self._entry_at(position)
        if entry < run.first:
            run.before = inputs.older_window(state, entry, self.engine)
            pages = pages and pages._replace(older=inputs.older_page(state))
        earlier = Earlier(state.query_group, state.query_conv)
        retrieved, earlier = self._retrieve(views.query, run, position, earlier, pages)
        if torch.is_grad_enabled():
            read = self._entry_at(next_state.position - 1) if retrieved.shape[1] else run.first
            anchor_chunks = batch_chunks(ttt_batch_size or self.batch_size, self.store_chunk_size)
            carried = state.weights is not None or state.states is not None
            unused = unused_parameters(self, run.first, read, anchor_chunks, carried, prev_weights is not None)
            retrieved = with_unused(retrieved, unused)
        entry = self._entry_at(next_state.position)
        older = run.entry(entry) if entry < run.last else None
        older_page = pages.at(entry) if pages and entry < run.last else None
        next_state = next_state._replace(**earlier._asdict(), read_weights=older, read_page=older_page)
        if detach_mem_state:
            next_state = mem_state_detach(next_state)
        tell(self, "stored", next_state, surprises)
        return (retrieved, next_state, surprises) if return_surprises else (retrieved, next_state)

    def store_memories(
        self,
        seq: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        past_state: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
        seq_index: int = 0,
        prev_weights: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        return_surprises: bool = True,
    ):
        """Stores complete chunks without reading.

        Args:
            seq: [b n d] ([2 b n d] with diff views), which begins at token `seq_index`.
            weights: the anchor, name -> [(b h) ...]; None: the initial weights.
            past_state: (memory, momentum), as `states` of a NeuralMemState; None: the memory starts at the anchor.
            seq_index: a multiple of the store chunk.
            prev_weights: as in forward.
            mask: [b n] bool, as store_mask in forward.
            return_surprises: return (loss, step) too, as in forward.

        Returns:
            (updates, next_state), and (loss, step) if asked for. updates: name -> [(b h) (chunks + 1) ...], the memory
            before each chunk and after the last.

        Raises:
            ValueError: for another shape, dtype or position.
        """
        if not isinstance(seq_index, int) or seq_index < 0 or seq_index % self.store_chunk_size:
            raise wrong("seq_index", seq_index, f"a multiple of the store chunk size, {self.store_chunk_size}")
        flags(return_surprises=return_surprises)
        view = inputs.as_store_view(seq, self.dim, self.diff_views, "seq")
        inputs.check_dtype(view, self.to_keys, "seq")
        expected = self._expected(view)
        if weights is not None:
            expected.check_weights(weights, "weights")
        if past_state is not None:
            expected.check_states(past_state, "past_state")
        inputs.check_mask(mask, *view.shape[-3:-1], "mask")
        state = NeuralMemState(seq_index, weights, states=past_state)
        _, next_state, surprises, _ = self._store(view, state, prev_weights, mask, None)
        return (next_state.updates, next_state, surprises) if return_surprises else (next_state.updates, next_state)

    def retrieve_memories(self, seq: Tensor, weights: Mapping[str, Tensor], page: Tensor | None = None) -> Tensor:
        """Reads from given weights.

        Args:
            seq: [b n d].
            weights: name -> [(b h) ...], the same for every token, or `updates` [(b h) (chunks + 1) ...], seq then
                beginning at their first chunk.
            page: the one that is read, long [b] or [b n] (read_active_page_only, which needs it).

        Returns:
            [b n d].

        Raises:
            ValueError: for other shapes, or updates that lack what these tokens read.
        """
        seq = inputs.as_query_view(seq, self.dim)
        inputs.check_dtype(seq, self.to_queries, "seq")
        expected = self._expected(seq)
        page = given_page(page, self.num_pages, *seq.shape[:2]) if self.reads_one_page else None
        entries = expected.has_entries(weights, "weights")
        expected.check_weights(weights, "weights", entries)
        if not entries:
            chunk, run = seq.shape[1] + 1, still_run(self.engine, 0, Carry(weights, weights, None))
            return self._retrieve(seq, run, 0, Earlier(), page, chunk)[0]
        first = getattr(weights, "first_chunk", None) or 0
        run = built_run({name: weights[name] for name in expected.shapes}, first, self.engine.reader)
        start = first * self.store_chunk_size
        needed = self._entry_at(start), self._entry_at(start + max(seq.shape[1], 1) - 1)
        if needed[0] < first or needed[1] > run.last:
            got = Words(f"the memory before chunks {first} to {run.last}")
            raise wrong("weights", got, f"the memory before chunks {needed[0]} to {needed[1]}, which these tokens read")
        if first and (not self.tokenwise or self.queries_conv is not None):
            takes = "updates from chunk 0 on: this memory's reads depend on the queries before"
            raise wrong("weights", Words(f"the memory from chunk {first} on"), takes)
        return self._retrieve(seq, run, start, Earlier(), page)[0]

    # storing

    def _store(self, tokens: Tensor, state: NeuralMemState, prev_weights, mask, ttt_batch_size):
        """tokens [(2) b n d] behind those that wait in the state: (run, next_state, surprises, the pages that are read
        or None)."""
        chunk, b, n = self.store_chunk_size, tokens.shape[-3], tokens.shape[-2]
        warn_if_diverged(self, state, n)
        anchor_chunks = batch_chunks(self.batch_size, chunk)
        if ttt_batch_size is not None:
            anchor_chunks = batch_chunks(ttt_batch_size, chunk, "ttt_batch_size")
        mask = inputs.join_masks(mask, state, b, n)
        if state.cache_store_segment is not None:
            tokens = torch.cat((state.cache_store_segment, tokens), dim=-2)

        first, count = state.seq_index // chunk, tokens.shape[-2] // chunk
        complete, waiting = tokens.split([count * chunk, tokens.shape[-2] - count * chunk], dim=-2)
        if prev_weights is not None and not self.accept_weight_residual:
            raise ValueError("prev_weights needs a memory built with accept_weight_residual = True")
        residual = None
        if prev_weights is not None and count:
            residual = inputs.residual_source(prev_weights, self._expected(tokens), first, count)
        carry, gate_carry = self._carry(state, b), self.gating.start(GateCarry.of(state), b, tokens.device)
        chunk_carry, page, choice = ChunkCarry.of(state), gate_carry.active_page_indices, None
        if count:
            span = self.span(complete, first, anchor_chunks)
            gated = self.gated_rates(span, gate_carry, residual is not None)
            gate_carry, choice = gated.carry, gated.choice
            self.gating.count(self, gated)
            allowed = None if mask is None else mask[:, : count * chunk]
            chunks, chunk_carry, error = self.chunks(span, gated, allowed, residual, chunk_carry)
            share = None if self.transition_gate is None else self.transition_gate.sigmoid()
            with no_autocast(tokens.device):
                run = store(self.engine, chunks, carry, anchor_chunks, share)
            surprises = tuple(of_rows(x, b) for x in run.surprises())
        else:
            run = still_run(self.engine, first, carry)
            surprises = (tokens.new_zeros(b, self.internal_heads, 0),) * 2
            error = None if self.predictor is None else tokens.new_zeros(b, 0)
        stood_still = count == 0 and state.states is not None
        momentum = state.states[1] if stood_still else self._momentum_of(run, b)
        next_state = NeuralMemState(
            seq_index=state.seq_index + count * chunk,
            weights=run.final.anchor,
            cache_store_segment=waiting.clone(),
            states=(run.final.memory, momentum),
            updates=run.updates(),
            cache_store_mask=None if mask is None else mask[:, count * chunk :].clone(),
            configuration=self.configuration,
            **gate_carry._asdict(),
            **chunk_carry._asdict(),
        )
        pages = entry_pages(first, page, choice and choice.page) if self.reads_one_page else None
        return run, next_state, surprises if error is None else (*surprises, error), pages

    def _momentum_of(self, run: Run, batch: int) -> Mapping[str, Tensor]:
        if not self.momentum_order:
            return {}
        orders = run.final.momentum
        if orders is None:
            return LazyTensors(run.shapes, lambda name: self.init_momentum(batch)[name])
        return LazyTensors(run.shapes, lambda name: torch.stack(tuple(orders[name])))

    def _carry(self, state: NeuralMemState, batch: int) -> Carry:
        anchor = self.init_weights(batch) if state.weights is None else state.weights
        if state.states is None:
            return Carry(anchor, anchor, None)
        memory, momentum = state.states
        orders = LazyTensors(memory, lambda name: momentum[name].unbind(0)) if self.momentum_order else None
        return Carry(anchor, memory, orders)

    def _expected(self, tokens: Tensor) -> inputs.StateShape:
        """What a state or weights must look like to go with tokens [(2) b n d]."""
        width = (*tokens.shape[:-2], tokens.shape[-1])
        dtype = self.memory_model_parameters[0].dtype
        shapes, tails = self._shapes(tokens.shape[-3]), conv_tails(self)
        return inputs.StateShape(self.store_chunk_size, shapes, self.momentum_order, dtype, width, tails)

    # reading

    def _entry_at(self, position: int) -> int:
        """How many chunks the memory has read that a query at this position reads."""
        group = self.retrieve_chunk_size
        return (position + 1) // group * group // self.store_chunk_size

    def _retrieve(self, seq: Tensor, run: Run, position: int, before: Earlier, pages=None, chunk: int | None = None):
        """seq [b n d] from absolute `position` on: (retrieved [b n d], what the reads that follow look back on). pages:
        those that are read, EntryPages or one for each token [b n]; None for all."""
        group, chunk = (chunk or self.retrieve_chunk_size), (chunk or self.store_chunk_size)
        b, n, _ = seq.shape
        if n == 0:
            return seq, before
        tokens = self.retrieve_norm(seq)
        page = pages.read(position, n, group, chunk) if isinstance(pages, EntryPages) else pages
        asked, tail = queries(self, tokens, before.query_conv)
        if not self.tokenwise:
            asked, position = inputs.with_earlier_queries(asked, before.query_group, position, group)
        with no_autocast(seq.device):
            out = run.read(asked.flatten(0, 1), position, group, chunk).unflatten(0, (b, -1))[:, :, -n:]
        end = position + asked.shape[2]
        unfinished = None if self.tokenwise else asked[:, :, asked.shape[2] - inputs.group_progress(end, group) :]
        return output(self, out, tokens, page), Earlier(unfinished, tail)
