// The steps of recurrent networks: see ../reference/recurrent.py. This follows kernels.cu.
//
// Thread i computes element i of the states, (rows, columns). A row of the gates has those of a unit `columns` apart.
// product: hidden @ weight of the step.  mask (rows,): nonzero where the step counts, or null.

// The place of a state's first gate, of `gates` in all.
__device__ Index first_gate(Index i, Index columns, int gates) {
    Index row = quotient(i, columns);
    return row * gates * columns + i - row * columns;
}

__device__ bool step_counts(const Byte* mask, Index i, Index columns) { return !mask || mask[quotient(i, columns)]; }

KERNEL rnn_step(const real* gates, const real* product, const Byte* mask, const real* before, Index n, Index columns,
                real* out) {
    FOR_EACH(i, n) out[i] = step_counts(mask, i, columns) ? tanh(gates[i] + product[i]) : before[i];
}

KERNEL lstm_step(real* gates, const real* product, const Byte* mask, const real* before, const real* cell_before,
                 Index n, Index columns, real* cell, real* out) {
    FOR_EACH(i, n) {
        Index at = first_gate(i, columns, 4), f_at = at + columns, g_at = at + 2 * columns, o_at = at + 3 * columns;
        real in = sigmoid_of(gates[at] + product[at]), f = sigmoid_of(gates[f_at] + product[f_at]);
        real g = tanh(gates[g_at] + product[g_at]), o = sigmoid_of(gates[o_at] + product[o_at]);
        real value = f * cell_before[i] + in * g;
        bool counts = step_counts(mask, i, columns);
        gates[at] = in, gates[f_at] = f, gates[g_at] = g, gates[o_at] = o;
        cell[i] = counts ? value : cell_before[i];
        out[i] = counts ? o * tanh(value) : before[i];
    }
}

// bias may be null.
KERNEL gru_step(real* gates, const real* product, const real* bias, const Byte* mask, const real* before, Index n,
                Index columns, real* inner, real* out) {
    FOR_EACH(i, n) {
        Index at = first_gate(i, columns, 3), z_at = at + columns, n_at = at + 2 * columns, unit = remainder_of(i, columns);
        real b_r = product[at], b_z = product[z_at], b_n = product[n_at];
        if (bias) b_r += bias[unit], b_z += bias[columns + unit], b_n += bias[2 * columns + unit];
        real r = sigmoid_of(gates[at] + b_r), z = sigmoid_of(gates[z_at] + b_z), value = tanh(gates[n_at] + r * b_n);
        gates[at] = r, gates[z_at] = z, gates[n_at] = value;
        inner[i] = b_n;
        out[i] = step_counts(mask, i, columns) ? (before[i] - value) * z + value : before[i];
    }
}

// Gradients. The gradient of the state after a step is grad + grad_hidden + product, in which the last is that of the
// gates of the next step @ weightᵀ; grad and product may be null. What the step itself adds to the gradient of the state
// before it, without that product, replaces grad_hidden.

__device__ real of_state(const real* grad, const real* product, const real* grad_hidden, Index i) {
    return grad_hidden[i] + (product ? product[i] : (real)0) + (grad ? grad[i] : (real)0);
}

KERNEL rnn_step_grad(const real* grad, const real* product, const Byte* mask, const real* state, Index n,
                     Index columns, real* grad_hidden, real* out) {
    FOR_EACH(i, n) {
        real g = of_state(grad, product, grad_hidden, i);
        bool counts = step_counts(mask, i, columns);
        out[i] = counts ? (1 - state[i] * state[i]) * g : (real)0;
        grad_hidden[i] = counts ? (real)0 : g;
    }
}

KERNEL lstm_step_grad(const real* grad, const real* product, const Byte* mask, const real* gates,
                      const real* cell_before, const real* cell, Index n, Index columns, real* grad_gates,
                      real* grad_hidden, real* grad_cell) {
    FOR_EACH(i, n) {
        Index at = first_gate(i, columns, 4), f_at = at + columns, g_at = at + 2 * columns, o_at = at + 3 * columns;
        real in = gates[at], f = gates[f_at], g = gates[g_at], o = gates[o_at];
        real of_hidden = of_state(grad, product, grad_hidden, i), tanh_cell = tanh(cell[i]);
        real of_cell = of_hidden * o * (1 - tanh_cell * tanh_cell) + grad_cell[i];
        bool counts = step_counts(mask, i, columns);
        grad_gates[at] = counts ? of_cell * g * (in * (1 - in)) : (real)0;
        grad_gates[f_at] = counts ? of_cell * cell_before[i] * (f * (1 - f)) : (real)0;
        grad_gates[g_at] = counts ? of_cell * in * (1 - g * g) : (real)0;
        grad_gates[o_at] = counts ? of_hidden * tanh_cell * (o * (1 - o)) : (real)0;
        grad_hidden[i] = counts ? (real)0 : of_hidden;
        if (counts) grad_cell[i] = of_cell * f;
    }
}

KERNEL gru_step_grad(const real* grad, const real* product, const Byte* mask, const real* gates, const real* before,
                     const real* inner, Index n, Index columns, real* grad_gates, real* grad_products,
                     real* grad_hidden) {
    FOR_EACH(i, n) {
        Index at = first_gate(i, columns, 3), z_at = at + columns, n_at = at + 2 * columns;
        real r = gates[at], z = gates[z_at], value = gates[n_at], g = of_state(grad, product, grad_hidden, i);
        bool counts = step_counts(mask, i, columns);
        real of_n = counts ? g * (1 - z) * (1 - value * value) : (real)0;
        real of_r = counts ? of_n * inner[i] * (r * (1 - r)) : (real)0;
        real of_z = counts ? g * (before[i] - value) * (z * (1 - z)) : (real)0;
        grad_gates[at] = of_r, grad_gates[z_at] = of_z, grad_gates[n_at] = of_n;
        grad_products[at] = of_r, grad_products[z_at] = of_z, grad_products[n_at] = of_n * r;
        grad_hidden[i] = counts ? g * z : g;
    }
}
